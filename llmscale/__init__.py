"""llmscale: pretraining, fine-tuning, reward modelling and RLHF from one config, from a laptop to a cluster."""

__version__ = "0.1.0"
