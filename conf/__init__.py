"""The Hydra config tree. Installed as the package llmscale.conf; a bare checkout reads it where it stands."""
