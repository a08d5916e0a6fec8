"""The last step of every writer: config and manifest, then the folder appears."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dropbydrop.system.atomic_folder import AtomicFolder

from .config import CONFIG_FILE, MANIFEST_FILE, REST_FILE, QuantizationConfig
from .files import Manifest, dump_json


def publish(
    folder: AtomicFolder,
    config: Mapping[str, Any],
    quantization: QuantizationConfig,
    planes: tuple[tuple[str, ...], ...],
    parameters: tuple[int, int],
    before_publish: Callable[[str], None] | None = None,
) -> None:
    """Write config.json and the manifest of everything in `folder`, and rename it to its OUT.

    Args:
        planes: planes[m - 1] are the file names of plane m.
        parameters: of the quantized linears, and of the original model.
        before_publish: called with the manifest's SHA-256 when all but the rename is done.
    """
    whole = {**config, "quantization_config": quantization.to_dict()}
    folder.write(CONFIG_FILE, [dump_json(whole)])
    manifest = Manifest(dict(folder.files), planes, (REST_FILE,), *parameters).to_dict()
    Manifest.from_dict(manifest)  # never write what the reader would refuse
    folder.write(MANIFEST_FILE, [dump_json(manifest)])
    if before_publish is not None:
        before_publish(folder.files[MANIFEST_FILE].sha256)
    folder.publish()
