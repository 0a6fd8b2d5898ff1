"""Reading a Keras file: the process that answers `read_keras_file` (`python -m models.keras.reader`).

`container.py` opens the file, `layers.py` follows its configuration, `arrays.py` finds the layers' tensors.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from models.common.errors import KerasFileError, one_line, printable
from models.keras.arrays import saved_arrays, saved_groups
from models.keras.container import check_classes, lists_names, open_container
from models.keras.file import Layer, check_values, pack_layers
from models.keras.layers import graph_layers
from models.keras.worker import serve


def read_content(content: bytes) -> tuple[dict, dict[str, np.ndarray]]:
    """Return `KerasFile`'s fields as a JSON object, and the layers' arrays as `pack_layers` names them.

    Raises KerasFileError with one line, and for damaged bytes whatever h5py, zipfile and json raise.
    """
    weights, config, version, kind = open_container(content)
    version = version and printable(version[:40])  # a person reads it
    names_tensors = True
    if config is None:
        names_tensors = lists_names(weights)
        layers = [Layer(name, "", {}, (), arrays) for name, arrays in saved_groups(weights)]
    else:
        check_classes(config)
        arrays = saved_arrays(config, weights)
        layers = [replace(layer, arrays=arrays.get(layer.name, {})) for layer in graph_layers(config)]
        check_values(layers)
    described, arrays = pack_layers(layers)
    fields = {
        "format": f"Keras {version} {kind}" if version else kind,
        "keras_version": version,
        "config": config,
        "names_tensors": names_tensors,
        "layers": described,
    }
    return fields, arrays


def read_safely(_: dict, arrays: dict[str, np.ndarray]) -> tuple[dict, dict[str, np.ndarray]]:
    """Answer one request of `read_keras_file`: the fields and arrays of a file's `content`.

    Raises KerasFileError with one line for whatever is wrong with the content.
    """
    content = arrays["content"].tobytes()
    limit_memory(2**29 + 8 * len(content))
    try:
        return read_content(content)
    except KerasFileError:
        raise
    except MemoryError:
        raise KerasFileError("reading it takes more memory than a file of its size should") from None
    except Exception as error:  # whatever damaged bytes or an odd configuration lead h5py, zipfile and us to
        raise KerasFileError(f"damaged, or not as Keras writes it ({one_line(error)})") from None


def limit_memory(more: int) -> None:
    """Let this process take `more` bytes than it has now, where the system can limit that (Linux)."""
    try:
        import resource

        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    soft = used + more if hard == resource.RLIM_INFINITY else min(used + more, hard)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def main() -> None:
    """Serve `read_keras_file`."""
    os.environ["HDF5_PLUGIN_PRELOAD"] = "::"  # a file must not make HDF5 load a filter plugin
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except ImportError:  # Windows
        pass
    import h5py  # noqa: F401  # imported while the caller imports torch

    serve(read_safely, refusals=(KerasFileError,))


if __name__ == "__main__":
    main()
