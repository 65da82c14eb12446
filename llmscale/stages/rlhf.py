"""RLHF as an algorithm: sample, score, experience, update, publish. `Rlhf.iterate` is one step of it; the parts are in their
own rooms, and the run around it (checkpoints, tracking, resuming) in `rlhf_run.py`.

Pools of workers (policy, reward, rollout and, where the method needs them, critic and reference) run in Ray actors or in
this process, with the same code.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np

from llmscale.batch import Prompt, Trajectory
from llmscale.cluster.pool import Instead, WorkerPool
from llmscale.cluster.publish import Publisher
from llmscale.data.loader import micro_batches
from llmscale.data.splits import Split
from llmscale.phases import phase
from llmscale.protocols import SamplingRequest, Score
from llmscale.rewards.diversity import diversity_metrics
from llmscale.rl.admission import (
    admitted,
    check_finite,
    check_some_left,
    reward_metrics,
    true_metrics,
    unscored,
    without_nonfinite,
)
from llmscale.rl.experience import (
    Experience,
    Scored,
    build_experience,
    check_first_update,
    check_on_policy,
    groups_of,
    is_informative,
    logprob_difference,
    minibatches,
    overlong_penalty,
)
from llmscale.rl.kl import AdaptiveCoefficient
from llmscale.rl.ledger import End, Ledger
from llmscale.rl.staleness import age_metrics, check_staleness, continued_share, room, staleness
from llmscale.rollout.completion import unsampled
from llmscale.rollout.config import OnUpdate
from llmscale.rollout.replay import Replay
from llmscale.rollout.turns import turn_metrics
from llmscale.stages.generation import Generation, Rewards, Taken, unjudged
from llmscale.stages.rlhf_config import OnNonfinite, RlhfConfig
from llmscale.stages.roles import CriticRole, PolicyRole, ReferenceRole, RewardRole, RolloutRole, new_algorithm
from llmscale.stages.shifts import Shifts

Metrics = dict[str, float]
Sampled = tuple[Trajectory, Score, Score | None]  # with its reward and true reward
EQUAL = {"why": "its samples all got the same reward"}
UNUSED = {"why": "the run ended before it was needed"}


class Rlhf:
    """One run's algorithm over its pools. `step` counts the finished steps; without staleness all else is a function of it and
    the seed."""

    def __init__(
        self,
        config: RlhfConfig,
        prompts: Split[Prompt],
        pools: Mapping[str, WorkerPool],
        publisher: Publisher,
        event: Callable[..., None],
        record: Callable[[int, Sequence[Trajectory]], None],
        ledger: Ledger,
        replay: Replay | None = None,
    ):
        self.config, self.prompts, self.pools, self.publisher, self.event = config, prompts, pools, publisher, event
        self.record, self.ledger, self.replay = record, ledger, replay
        self.shifts = Shifts(config.colocated, pools, event)
        self.aborts = config.rollout.on_update is OnUpdate.abort
        apart = "reference" not in config.colocated
        self.generation = Generation(
            pools, config.rollout.unit_size, replay, asks_reference=apart, continues=self.aborts
        )
        self.order = prompts.order(config.run.seed)
        self.algorithm = new_algorithm(config)
        self.kl_coef = AdaptiveCoefficient(
            config.algorithm.kl_coef, config.algorithm.kl_target, config.algorithm.kl_horizon
        )
        self.step = 0
        self.weights = 0  # the newest version for the rollout workers; 0 are those that they started with
        self.updates = {0: 0}  # how many were done when a version was published; of those that a sample may be of
        self.timings: Metrics = {}

    def iterate(self) -> tuple[Metrics, list[Scored]]:
        """One step: what it measured, and the samples that it learned from."""
        self.timings = {}
        scored, sampled, metrics = self.collect()
        ages = self.ages([t for t, *_ in sampled])
        version = self.weights if self.replay is None else None
        experience, found = build_experience(self.algorithm, scored, self.kl_coef.value, version)
        metrics |= found
        if self.config.scores_by_policy and (self.replay is None or self.replay.on_policy):
            check_on_policy(metrics, self.config.max_logprob_diff)
        with self.timed("update"):
            metrics |= self.update(experience)
        self.step += 1
        with self.timed("publish"):
            self.publish()
        self.settle(scored, sampled, ages)
        if "kl/ref" in metrics:
            metrics["kl/coef"] = self.kl_coef.value
            self.kl_coef.update(metrics["kl/ref"], len(scored))
        if self.config.training.max_staleness:
            metrics |= age_metrics(ages)
        if self.aborts:
            metrics["rollout/continued"] = continued_share([t for t, *_ in sampled])
        return metrics | self.performance(metrics.pop("perf/tokens")), scored

    def collect(self) -> tuple[list[Scored], list[Sampled], Metrics]:
        """This step's draws, scored; where `filter_groups`, others for those whose samples all got the same reward, which teach
        nothing (dynamic sampling: Yu et al. 2025, section 3.2). Metrics are of all that was sampled for it."""
        algorithm, wanted = self.config.algorithm, self.config.training.prompts_per_step
        kept: list[list[Scored]] = []
        groups: list[list[Scored]] = []  # of the last draw that left any
        sampled: list[Sampled] = []
        num_scored = 0
        for _ in range(algorithm.max_draws if algorithm.filter_groups else 1):
            with self.timed("generate"):
                self.begin(under_way=len(kept) + len(self.generation.draws))
                taken = self.generation.take(wanted - len(kept))
                trajectories = taken.trajectories()
            self.record(self.step + 1, trajectories)
            with self.timed("score"):
                scored, fresh = self.score(taken, trajectories)
            sampled += fresh
            num_scored += len(scored)
            groups = groups_of(scored) or groups
            kept += [g for g in groups_of(scored) if not algorithm.filter_groups or is_informative(g)]
            if len(kept) == wanted:
                break
        check_some_left(len(groups), [t for t, *_ in sampled], [s for _, s, _ in sampled])
        metrics = reward_metrics([s for _, s, _ in sampled], num_scored) | true_metrics([t for *_, t in sampled])
        metrics |= self.of_rollouts([t for t, *_ in sampled])
        metrics["perf/tokens"] = sum(t.completion_len for t, *_ in sampled)  # those that are not learned from, too
        # Where none of them teaches, an update of nothing.
        return [sample for group in kept or groups for sample in group], sampled, metrics

    def begin(self, under_way: int) -> None:
        """Hand in as many draws as the bound on staleness leaves room for."""
        training = self.config.training
        steps_left = training.num_steps - self.step
        num = room(training.max_staleness, training.prompts_per_step, steps_left, under_way)
        if num:
            self.shifts.of_rollouts()
        self.generation.begin(self.requests(self.ledger.begin(num, self.step)))

    def requests(self, draws: Sequence[int]) -> list[SamplingRequest]:
        """`group_size` samples of each."""
        group, weights = range(self.config.group_size), self.weights
        pairs = zip(draws, self.prompts_of(draws), strict=True)
        return [SamplingRequest(prompt, draw, k, weights=weights) for draw, prompt in pairs for k in group]

    def prompts_of(self, draws: Sequence[int]) -> list[Prompt]:
        return [self.prompts.train[i] for i in self.order.at(np.array(draws)).tolist()] if draws else []

    def score(self, taken: Taken, trajectories: Sequence[Trajectory]) -> tuple[list[Scored], list[Sampled]]:
        """Rewards, and every model's view of every token; the pools work side by side. Samples without a reward are left
        out of the first list."""
        self.shifts.of_training()
        old_logprobs = self.view("policy", PolicyRole.logprobs, trajectories)
        ref_logprobs = self.reference(taken, trajectories)
        values = self.view("critic", CriticRole.values, trajectories)
        scores, true = self.rewards(trajectories, taken.rewards(), self.step + 1)
        kept = admitted(trajectories, scores, whole_draws=self.config.algorithm.needs_groups)
        views = [old_logprobs(), ref_logprobs(), values()]
        scored = [self.scored(trajectories[i], scores[i], true[i], [view[i] for view in views]) for i in kept]
        return scored, list(zip(trajectories, scores, true, strict=True))

    def scored(self, trajectory: Trajectory, score: Score, true: Score | None, views: Sequence[Any]) -> Scored:
        assert score.value is not None, "it was admitted"
        algorithm, limit = self.config.algorithm, self.config.max_completion_tokens
        # One that was cut off has been at a limit, though with an environment that may be the one of a turn.
        length = trajectory.completion_len if trajectory.finished else limit
        penalty = overlong_penalty(length, limit, algorithm.overlong_share, algorithm.overlong_penalty)
        parts = {**score.parts, "overlong": penalty} if algorithm.overlong_share else score.parts
        true_reward = true.value if true is not None else None
        old, ref, values = views
        return Scored(trajectory, score.value, true_reward, old, ref, values, parts, score.why, penalty, score.early)

    def reference(self, taken: Taken, trajectories: Sequence[Trajectory]) -> Callable[[], list[Any]]:
        """Ask the reference, which of a policy with an adapter is the policy without it; another one has been asked."""
        if self.config.reference_is_base:
            return self.pools["policy"].map(PolicyRole.ref_logprobs, trajectories).wait
        if "reference" in self.config.colocated:  # it has slept till now
            return self.view("reference", ReferenceRole.logprobs, trajectories)
        return taken.ref_logprobs

    def view(
        self, role: str, method: Callable[..., Any], trajectories: Sequence[Trajectory]
    ) -> Callable[[], list[Any]]:
        """Begin to ask a role about every trajectory; None for each where the algorithm does not need its view."""
        if role not in self.pools or (role == "policy" and not self.config.scores_by_policy):
            return lambda: [None] * len(trajectories)
        return self.pools[role].map(method, trajectories).wait

    def rewards(
        self, trajectories: Sequence[Trajectory], given: Rewards, step: int
    ) -> tuple[list[Score], list[Score | None]]:
        """The rewards and the true ones, as the reward workers gave them; what cannot be used is recorded, or stops the run."""
        scores, true = [s for s, _ in given], [t for _, t in given]
        if self.config.on_nonfinite is OnNonfinite.stop:
            check_finite(trajectories, scores)
        scores = without_nonfinite(scores)
        for sample in unscored(trajectories, scores):
            self.event("sample_excluded", step=step, **asdict(sample))
        return scores, true

    def update(self, experience: Sequence[Experience]) -> Metrics:
        """Every epoch over every minibatch, policy and critic side by side."""
        algorithm, seed = self.config.algorithm, self.config.run.seed
        batches = [
            [experience[i] for i in indexes]
            for epoch in range(algorithm.num_epochs)
            for indexes in minibatches(len(experience), algorithm.global_batch_size, seed, self.step, epoch)
        ]
        policy = self.pools["policy"].call(PolicyRole.update, batches)
        critic = self.pools["critic"].call(CriticRole.update, batches) if "critic" in self.pools else None
        policy_steps = policy.wait()[0]
        metrics = _means("policy", policy_steps) | (_means("value", critic.wait()[0]) if critic else {})
        difference = metrics.pop("policy/logprob_diff")
        if not self.config.scores_by_policy:
            metrics["rollout/logprob_diff"] = difference
            check_on_policy(metrics, self.config.max_logprob_diff)
        check_first_update(policy_steps[0]["approx_kl"], self.config.max_logprob_diff)
        return metrics

    def ages(self, trajectories: Sequence[Trajectory]) -> dict[int, int]:
        """The staleness of each draw, which is that of its oldest token. Versions of what is replayed are another run's."""
        if self.replay is not None:
            return {}
        found = staleness(trajectories, self.updates, self.step)
        check_staleness(trajectories, found, self.config.training.max_staleness)
        ages: dict[int, int] = {}
        for trajectory, age in zip(trajectories, found.tolist(), strict=True):
            ages[trajectory.draw_id] = max(age, ages.get(trajectory.draw_id, 0))
        return ages

    def publish(self) -> None:
        """New weights for every rollout worker, checked by fingerprint on both sides. A worker takes them when it is done with
        the unit that it is about, or breaks it off (`rollout.on_update`); nobody waits for that before the bound on staleness
        says so."""
        if self.replay is not None:
            return
        policy, rollout, sent = self.pools["policy"], self.pools["rollout"], self.shifts.of_rollouts
        self.shifts.of_training()
        interrupt = RolloutRole.interrupt if self.aborts else None
        self.weights = self.publisher.publish(
            policy, PolicyRole.publish, rollout, RolloutRole.load_weights, sent, interrupt
        )
        bound = self.config.training.max_staleness
        self.publisher.wait(at_most=bound)
        made = self.updates | {self.weights: self.step}
        self.updates = {version: updates for version, updates in made.items() if updates >= self.step - bound}

    def settle(self, scored: Sequence[Scored], sampled: Sequence[Sampled], ages: Mapping[int, int]) -> None:
        """Every draw that this step has taken ends."""
        trained = {s.trajectory.draw_id for s in scored}
        why = {t.draw_id: {"why": score.why} for t, score, _ in reversed(sampled) if score.value is None}
        dropped = {t.draw_id: why.get(t.draw_id, EQUAL) for t, *_ in sampled if t.draw_id not in trained}
        age = {draw: {"staleness": ages[draw]} if draw in ages else {} for draw in sorted(trained)}
        self.ledger.end(self.step, End.trained, age)
        self.ledger.end(self.step, End.dropped, dropped)

    def resume(self) -> None:
        """Of the draws that were under way at the checkpoint, those whose samples it holds go on; the others are requeued."""
        if self.step < self.config.training.num_steps:
            found = self.generation.resume(self.prompts_of)
            lost = sorted(self.ledger.open.keys() - found)
            self.ledger.requeue(self.step + 1, lost, self.step, "under way when the run stopped")
            self.generation.begin(self.requests(lost))

    def close(self) -> None:
        """What no step has taken: with `filter_groups` more may be under way than the last steps need."""
        self.generation.close()
        self.publisher.close()
        self.ledger.end(self.step + 1, End.dropped, {draw: UNUSED for draw in sorted(self.ledger.open)})

    def evaluate(self) -> Metrics:
        """Mean scores on the held-out prompts. Their draws are the same every time, so that two policies are compared on
        the same randomness. What is replayed says nothing of them: another policy sampled it."""
        if not self.prompts.validation or self.replay is not None:
            return {}
        with self.timed("evaluate"):
            held_out = enumerate(self.prompts.validation)
            requests = [SamplingRequest(p, -1 - i, 0, weights=self.weights) for i, p in held_out]
            self.shifts.of_rollouts()
            trajectories = self.of_units("rollout", RolloutRole.generate, requests, unsampled)
            given = self.of_units("reward", RewardRole.score, trajectories, unjudged)
            compared = self.compared(trajectories)
        scores, true = self.rewards(trajectories, given, self.step)
        kept = admitted(trajectories, scores, whole_draws=False)
        check_some_left(len(kept), trajectories, scores)
        metrics = {"reward/mean": float(np.mean([scores[i].value for i in kept]))}
        metrics |= reward_metrics(scores, len(kept)) | true_metrics(true) | self.of_rollouts(trajectories) | compared
        metrics["rollout/completion_len"] = float(np.mean([t.completion_len for t in trajectories]))
        timing = {"timing_s/evaluate": self.timings["timing_s/evaluate"]}
        return {f"eval/{name}": value for name, value in metrics.items()} | timing

    def compared(self, trajectories: Sequence[Trajectory]) -> Metrics:
        """Rollout with trainer, where no sample that is trained on may be of the weights that are trained."""
        if not self.config.training.max_staleness:
            return {}
        difference = logprob_difference(trajectories, self.view("policy", PolicyRole.logprobs, trajectories)())
        found = {} if difference is None else {"rollout/logprob_diff": difference}
        check_on_policy(found, self.config.max_logprob_diff)
        return found

    def of_rollouts(self, trajectories: Sequence[Trajectory]) -> Metrics:
        turns = turn_metrics(trajectories) if self.config.environment is not None else {}
        return diversity_metrics(trajectories) | turns

    def of_units(self, role: str, method: Callable[..., Any], items: Sequence[Any], instead: Instead) -> list[Any]:
        """What a role says of each item, in dispatch units."""
        units = self.pools[role].units(method, micro_batches(items, self.config.rollout.unit_size), instead)
        return [result for unit in units.wait() for result in unit]

    def performance(self, num_tokens: float) -> Metrics:
        seconds = sum(self.timings.values())
        waited = self.timings["timing_s/generate"] / seconds  # with nothing else to do
        found = {
            "perf/tokens_per_s": num_tokens / seconds,
            "perf/waited": waited,
            "perf/ready": self.generation.num_ready,
        }
        return found | self.timings

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        with phase(name):
            yield
        key = f"timing_s/{name}"
        self.timings[key] = self.timings.get(key, 0.0) + time.perf_counter() - started


def _means(prefix: str, steps: Sequence[Metrics]) -> Metrics:
    names = [n for n in steps[0] if n != "num_tokens"]
    return {f"{prefix}/{name}": float(np.mean([s[name] for s in steps])) for name in names}
