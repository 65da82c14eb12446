from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from llmscale.config import check
from llmscale.data.config import DataConfig
from llmscale.data.loader import SampleOrder
from llmscale.data.mixing import BLOCK, MixedOrder, Mixture, quotas
from llmscale.data.splits import load_conversations, load_prompts, load_rankings, load_text
from llmscale.data.text import read_texts
from llmscale.errors import ConfigError, DataError
from llmscale.randomness import permutation

SIZES = {"web": 3000, "books": 40, "code": 7}


def mixture(sizes=SIZES, **config) -> Mixture:
    names = {name: "f" for name in sizes}
    check(made := DataConfig(mixture=names, **{f"mixture_{key}": value for key, value in config.items()}))
    return Mixture.of(sizes, made)


def rates(**config) -> dict[str, float]:
    return {name: plan["rate"] for name, plan in mixture(**config).plan(1).items()}


def samples(order: MixedOrder, size: int, steps: range) -> list[int]:
    return [i for step in steps for i in order.batch(step, size)]


def source_of(index: int) -> str:
    return "web" if index < 3000 else "books" if index < 3040 else "code"


# ---------------------------------------------------------------- rates


def test_rates_follow_weights_sizes_temperature_and_cap():
    assert rates(weights={"web": 2, "books": 1, "code": 1}) == {"web": 0.5, "books": 0.25, "code": 0.25}
    for config, shares in (
        ({}, [3000, 40, 7]),
        ({"temperature": 2.0}, [3000**0.5, 40**0.5, 7**0.5]),
        ({"cap": 30}, [30, 30, 7]),
        ({"cap": 100, "temperature": 4.0}, [100**0.25, 40**0.25, 7**0.25]),
        ({"temperature": 1e9}, [1, 1, 1]),
    ):
        expected = np.array(shares) / sum(shares)
        assert np.allclose(list(rates(**config).values()), expected, atol=1 / BLOCK), config


@pytest.mark.parametrize("seed", range(20))
def test_quotas_are_the_nearest_whole_numbers(seed):
    rng = np.random.default_rng(seed)
    given = rng.random(int(rng.integers(1, 40))) ** rng.integers(1, 9)
    made = quotas(given)
    assert made.sum() == BLOCK and made.min() >= 1
    is_small = made == 1
    exact = given / given[~is_small].sum() * (BLOCK - is_small.sum())
    assert (np.abs(made - exact)[~is_small] < 1).all() and (exact[is_small] < 2).all()


def test_every_source_has_a_place_in_each_block():
    assert quotas(np.array([1.0, 1e-12])).tolist() == [BLOCK - 1, 1]
    assert quotas(np.ones(BLOCK)).tolist() == [1] * BLOCK
    assert quotas(np.array([3.0, 1.0])).tolist() == [3072, 1024]
    with pytest.raises(ConfigError, match="4096") as caught:
        mixture({str(i): 1 for i in range(BLOCK + 1)})
    assert caught.value.where == "data.mixture"


def test_the_plan_says_size_rate_and_epochs():
    plan = mixture(weights={"web": 2, "books": 1, "code": 1}).plan(num_samples=1200)
    assert plan == {
        "web": {"examples": 3000, "rate": 0.5, "epochs": 0.2},
        "books": {"examples": 40, "rate": 0.25, "epochs": 7.5},
        "code": {"examples": 7, "rate": 0.25, "epochs": 42.86},
    }


# ---------------------------------------------------------------- the order


def slow(mixed: Mixture, seed: int, count: int) -> list[int]:
    """The definition, position by position."""
    sizes, shares = list(mixed.sizes.values()), list(mixed.quotas.values())
    drawn = [0] * len(sizes)
    indexes: list[int] = []
    while len(indexes) < count:
        slots = [source for source, share in enumerate(shares) for _ in range(share)]
        for slot in permutation(seed, "mixture", len(indexes) // BLOCK, size=BLOCK):
            source = slots[slot]
            epoch, offset = divmod(drawn[source], sizes[source])
            own = permutation(seed, "epoch", epoch, source, size=sizes[source])[offset]
            indexes.append(sum(sizes[:source]) + int(own))
            drawn[source] += 1
    return indexes[:count]


@pytest.mark.parametrize("seed", [0, 5])
def test_it_is_the_definition(seed):
    mixed = mixture(temperature=3.0)
    count = 2 * BLOCK + 500
    assert samples(MixedOrder(mixed, seed), 4, range(count // 4)) == slow(mixed, seed, count)


def test_counts_are_exact_at_the_end_of_every_block():
    mixed = mixture(weights={"web": 5, "books": 2, "code": 1})
    drawn = Counter(map(source_of, samples(MixedOrder(mixed, 1), BLOCK // 2, range(6))))
    assert drawn == {name: 3 * quota for name, quota in mixed.quotas.items()} and drawn["web"] == 3 * 2560


def test_each_source_goes_through_itself_before_it_comes_again():
    drawn = samples(MixedOrder(mixture(weights={"web": 1, "books": 1, "code": 2}), 2), 100, range(60))
    for first, size in ((3000, 40), (3040, 7)):
        own = [i for i in drawn if first <= i < first + size]
        epochs = [tuple(own[i : i + size]) for i in range(0, len(own) - size, size)]
        assert all(sorted(epoch) == list(range(first, first + size)) for epoch in epochs)
        assert len(set(epochs)) > 10
    assert max(Counter(i for i in drawn if i < 3000).values()) == 1


def test_order_is_a_function_of_the_position_alone():
    mixed = mixture()
    order = MixedOrder(mixed, 3)
    straight = [order.batch(step, 96) for step in range(100)]
    assert [MixedOrder(mixed, 3).batch(step, 96) for step in (0, 42, 43, 99)] == [straight[i] for i in (0, 42, 43, 99)]
    assert [order.batch(step, 96) for step in reversed(range(100))] == straight[::-1]
    assert samples(order, 960, range(10)) == [i for batch in straight for i in batch]
    assert type(straight[0][0]) is int
    assert MixedOrder(mixed, 4).batch(0, 96) != straight[0]


# ---------------------------------------------------------------- through the loaders


def chats(name: str, count: int) -> list[dict[str, str]]:
    return [{"prompt": f"{name}{i}", "completion": "A", "chosen": "A", "rejected": "B"} for i in range(count)]


def sources(write, **counts: int) -> dict[str, str]:
    return {name: write(f"{name}.jsonl", chats(name, count)) for name, count in counts.items()}


def test_sources_are_mixed_for_every_stage(write, tokenizer, cache):
    config = DataConfig(mixture=sources(write, a=30, b=10), mixture_weights={"a": 1, "b": 3}, validation_fraction=0.1)
    for split in (
        load_conversations(config, tokenizer, cache),
        load_rankings(config, tokenizer, cache),
        load_prompts(config, tokenizer, 8),
    ):
        assert (len(split.train), len(split.validation)) == (27 + 9, 3 + 1)
        assert (split.report["records"], split.report["validation_records"]) == (36, 4)
        assert split.report["tokens"] == split.train.lengths.sum()
        assert split.mixture is not None and split.mixture.sizes == {"a": 27, "b": 9}
        drawn = split.order(0).batch(0, BLOCK)
        assert sum(i >= 27 for i in drawn) == BLOCK * 3 // 4 and max(drawn) == 35
    texts = [p.text for p in load_prompts(config, tokenizer, 8).train]
    assert [text[0] for text in texts] == ["a"] * 27 + ["b"] * 9


def test_raw_text_is_mixed_by_blocks(write, tokenizer, cache):
    mixed = {"long": write("long.txt", "the cat sat " * 400), "short": write("short.txt", "the dog " * 20)}
    config = DataConfig(mixture=mixed, max_seq_len=16, validation_fraction=0.1)
    split = load_text(config, tokenizer, cache)
    assert split.mixture is not None and sum(split.mixture.sizes.values()) == len(split.train)
    assert all(tokenizer.decode(part[-1].token_ids).endswith("<|eos|>") for part in [split.validation])
    assert list(read_texts(config)) == ["the cat sat " * 400, "the dog " * 20]


def test_a_plain_source_has_the_plain_order(write, tokenizer, cache):
    split = load_conversations(DataConfig(train=write("a.jsonl", chats("a", 12))), tokenizer, cache)
    assert split.mixture is None
    assert [split.order(7).batch(s, 5) for s in range(9)] == [SampleOrder(12, 7).batch(s, 5) for s in range(9)]


def test_an_error_names_the_source(write, tokenizer, cache):
    config = DataConfig(mixture=sources(write, a=3, b=3) | {"c": write("c.jsonl", [{"prompt": "Q", "completion": ""}])})
    with pytest.raises(DataError, match="none of the 1 records") as caught:
        load_conversations(config, tokenizer, cache)
    assert caught.value.where == config.mixture["c"]


@pytest.mark.realdata
def test_web_pages_and_plays(shared_data, tokenizer, cache):
    folder = shared_data / "pretrain"
    mixed = {"web": str(folder / "c4_demo.jsonl"), "plays": str(folder / "tinyshakespeare.txt")}
    split = load_text(DataConfig(mixture=mixed, mixture_temperature=2.0), tokenizer, cache)
    assert split.mixture is not None
    web, plays = split.mixture.sizes.values()
    shares = {name: plan["rate"] for name, plan in split.mixture.plan(1000).items()}
    assert shares["plays"] / shares["web"] == pytest.approx((plays / web) ** 0.5, rel=2e-3)
    drawn = split.order(0).batch(0, BLOCK)
    assert Counter(i < web for i in drawn)[True] == split.mixture.quotas["web"]
