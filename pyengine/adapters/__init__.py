"""Low-rank adapters in the format of PEFT: adapter_config.json and adapter_model.safetensors, read and written."""

from pyengine.adapters.config import AdapterConfig
from pyengine.adapters.files import AdapterModule, AdapterWeights, linear_modules, read_adapter, write_adapter

__all__ = ["AdapterConfig", "AdapterModule", "AdapterWeights", "linear_modules", "read_adapter", "write_adapter"]
