"""Writes the files of the hostile tests as the first corpus of the fuzz targets.   seeds.py FOLDER"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.formats import gguf_builder, hostile_gguf, hostile_safetensors

GGUF = [
    gguf_builder.small_valid_file(),
    gguf_builder.middle_valid_file(),
    *(content for content, _ in hostile_gguf.UPSTREAM.values()),
    *hostile_gguf.BROKEN.values(),
    *hostile_gguf.LOADS.values(),
]
SAFETENSORS = [*hostile_safetensors.BROKEN.values(), *hostile_safetensors.LOADS.values()]

for name, files in (("gguf", GGUF), ("safetensors", SAFETENSORS)):
    folder = Path(sys.argv[1]) / name
    folder.mkdir(parents=True, exist_ok=True)
    for i, content in enumerate(files):
        (folder / f"seed{i:03}").write_bytes(content)
