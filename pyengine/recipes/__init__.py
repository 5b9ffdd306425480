"""One file per stage: a configuration and `run(config)`. What stages share is in `pyengine.train`."""
