"""Image-text shards: made (`prepare`), read by megatron-energon (`loader`), mixed, and measured (`bench`)."""
