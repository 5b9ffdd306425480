"""One file per stage: a configuration and `run(config)`. Recipes share mechanism through `pyengine.train`, not each other."""
