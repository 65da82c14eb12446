"""Where the rooms are joined. Importing this package registers every option of every group."""

from llmscale.stages import answering_config, config, rlhf_config

__all__ = ["answering_config", "config", "rlhf_config"]
