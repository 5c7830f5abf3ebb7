"""The command `tritonshare train`: data, options, an epoch, fine-tuning, checkpoints and pictures of a run."""
