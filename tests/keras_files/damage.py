"""Damage Keras files: their bytes (anywhere, and in HDF5's structure), and their content.

In an archive, bytes are damaged inside a member too, whose checksum is then right. Damaged content is valid
HDF5 or JSON with tensors missing, added, renamed, reshaped, retyped or swapped, and values edited.
"""

import contextlib
import copy
import io
import json
import random
import re
import zipfile

import h5py
import numpy as np

# --- Damaged bytes ---------------------------------------------------------------------------------------


def flip(data: bytearray, rng: random.Random, places: list[int]) -> None:
    for _ in range(rng.choice([1, 1, 2, 4, 16, 64])):
        data[rng.choice(places)] ^= 1 << rng.randrange(8)


def flip_anywhere(data: bytearray, rng: random.Random) -> None:
    flip(data, rng, range(len(data)))


def flip_ends(data: bytearray, rng: random.Random) -> None:
    """Damage the superblock and the first headers, or the end, where an archive has its directory."""
    size = min(rng.choice([64, 256, 2048]), len(data))
    flip(data, rng, range(size) if rng.random() < 0.7 else range(len(data) - size, len(data)))


def structure(data: bytearray) -> list[int]:
    """Return the offsets of HDF5's B-trees, symbol tables, heaps and object headers."""
    found = re.finditer(rb"TREE|SNOD|HEAP|GCOL|OHDR|FRHP|BTHD|\x01\x00[\x01-\x20]\x00", data)
    places = [mark.start() + offset for mark in found for offset in range(96)]
    return [place for place in places if place < len(data)] or list(range(len(data)))


def flip_structure(data: bytearray, rng: random.Random) -> None:
    flip(data, rng, structure(data))


def set_structure(data: bytearray, rng: random.Random) -> None:
    """Overwrite a number: a size, a count, an offset."""
    for _ in range(rng.choice([1, 1, 3])):
        at, size = rng.choice(structure(data)), rng.choice([1, 2, 4, 8])
        end = 2 ** (8 * size)
        value = rng.choice([0, 1, end - 1, end // 2, end // 2 - 1, rng.randrange(end)])
        data[at : at + size] = value.to_bytes(size, "little")


def cut(data: bytearray, rng: random.Random) -> None:
    if rng.random() < 0.7:
        del data[rng.randrange(len(data)) :]
    else:
        at = rng.randrange(len(data))
        del data[at : at + rng.choice([1, 8, 512, 4096])]


def block(data: bytearray, rng: random.Random) -> tuple[int, int]:
    size = min(rng.choice([4, 16, 64, 512, 4096]), len(data) // 2)
    return rng.randrange(len(data) - size + 1), size


def overwrite_block(data: bytearray, rng: random.Random) -> None:
    at, size = block(data, rng)
    data[at : at + size] = rng.choice([bytes(size), b"\xff" * size, rng.randbytes(size)])


def swap_blocks(data: bytearray, rng: random.Random) -> None:
    (first, size), other = block(data, rng), rng.randrange(len(data) // 2)
    a, b = bytes(data[first : first + size]), bytes(data[other : other + size])
    data[first : first + size], data[other : other + len(b)] = b.ljust(size, b"\0"), a[: len(b)]


BYTES = [flip_anywhere, flip_ends, flip_structure, set_structure, cut, overwrite_block, swap_blocks]

# --- Wrong content ---------------------------------------------------------------------------------------


def objects(file: h5py.File, kind: type) -> list:
    found = [file] if kind is h5py.Group else []
    file.visititems(lambda _, member: found.append(member) if isinstance(member, kind) else None)
    return found


def tensors(file: h5py.File, rng: random.Random, count: int = 1) -> list:
    weights = [data for data in objects(file, h5py.Dataset) if "optimizer" not in data.name]
    return rng.sample(weights, count)


def remove_tensor(file: h5py.File, rng: random.Random) -> None:
    del file[rng.choice([tensors(file, rng)[0].name, rng.choice(objects(file, h5py.Group)[1:]).name])]


def add_tensor(file: h5py.File, rng: random.Random) -> None:
    group = rng.choice(objects(file, h5py.Group))
    name = rng.choice(["0", "1", "2", "4", "gamma", "kernel:0", "extra", "vars", "layers", "vars_1"])
    group[name] = np.ones(4)


def rename(file: h5py.File, rng: random.Random) -> None:
    member = rng.choice(objects(file, rng.choice([h5py.Group, h5py.Dataset]))[1:])
    name = rng.choice(["kernel", "beta:0", "7", "x", "vars", "dense", "conv2d_1", "."])
    file.move(member.name, f"{member.parent.name}/{name}")


def reshape_tensor(file: h5py.File, rng: random.Random) -> None:
    data = tensors(file, rng)[0]
    name, array = data.name, data[()]
    longer = (*array.shape[:-1], array.shape[-1] + 1) if array.ndim else (2,)
    shapes = [(array.size,), (1, array.size), (*array.shape, 1), array.shape[::-1], longer, (), (0,)]
    shape = rng.choice(shapes)
    del file[name]
    file[name] = np.resize(array, shape)


def retype_tensor(file: h5py.File, rng: random.Random) -> None:
    data = tensors(file, rng)[0]
    name, array = data.name, data[()]
    del file[name]
    types = [*"f2 >f4 f8 i1 u8 c8 ? S4 V3".split(), h5py.string_dtype(), np.dtype([("a", "f4")])]
    with contextlib.suppress(TypeError, ValueError):  # not every array can be every type
        file[name] = array.astype(rng.choice(types))


def wrong_values(file: h5py.File, rng: random.Random) -> None:
    data = tensors(file, rng)[0]
    array = data[()]
    if array.size and array.dtype.kind == "f":
        array.flat[rng.randrange(array.size)] = rng.choice([np.nan, np.inf, -np.inf, -1, 3e38, -0.0])
        data[...] = array


def swap_tensors(file: h5py.File, rng: random.Random) -> None:
    first, second = (data.name for data in tensors(file, rng, 2))
    file.move(first, "/swapped")
    file.move(second, first)
    file.move("/swapped", second)


def edit_attribute(file: h5py.File, rng: random.Random) -> None:
    groups = [group for group in objects(file, h5py.Group) if len(group.attrs)]
    if groups:
        attributes = rng.choice(groups).attrs
        name = rng.choice(sorted(attributes))
        value = attributes[name]
        if isinstance(value, np.ndarray) and len(value) and rng.random() < 0.6:
            items = value.tolist()
            odd = rng.choice([rng.choice(items), b"", b"/", b"..", b"\xff", b"x" * 500])
            items[rng.randrange(len(items))] = odd
            attributes[name] = items if rng.random() < 0.7 else items[1:]
        elif rng.random() < 0.3:
            del attributes[name]
        else:
            odd = [1, 1.5, [1, 2], "x", "", b"\xff\xfe", "{}", "[]", '{"class_name": "x"}', "é" * 9]
            attributes[name] = rng.choice(odd)


TENSORS = [remove_tensor, add_tensor, reshape_tensor, retype_tensor, wrong_values, swap_tensors]
HDF5 = [*TENSORS, rename, edit_attribute]
SCALARS = [None, True, False, 0, 1, -1, 2.5, 1e400, 10**30, "", "x", "relu", "Lambda", "é\0"]
CLASSES = [{"class_name": "Zeros", "config": {}}, {"class_name": "Lambda", "config": {}}]
ODD = [*SCALARS, *CLASSES, [], [1, 1], [[[]]], {}, {"a": 1}, ["a", 0, 0, {}]]


def edit_json(source: str, rng: random.Random) -> str:
    """Replace, remove, repeat or move a few values somewhere in a JSON document."""
    document = json.loads(source)
    for _ in range(rng.choice([1, 1, 2, 5])):
        containers, pending = [], [document]
        while pending:
            value = pending.pop()
            if isinstance(value, (dict, list)):
                if value:
                    containers.append(value)
                pending += value.values() if isinstance(value, dict) else value
        if not containers:
            break
        container = rng.choice(containers)
        key = rng.choice(list(container) if isinstance(container, dict) else range(len(container)))
        action = rng.random()
        if action < 0.5:
            container[key] = copy.deepcopy(rng.choice(ODD))
        elif action < 0.7:
            del container[key]
        elif action < 0.85 and isinstance(container, list):
            container.append(copy.deepcopy(container[key]))
        else:
            other = rng.choice(containers)
            value = other[rng.choice(list(other))] if isinstance(other, dict) else other
            container[key] = copy.deepcopy(value)
    return json.dumps(document)


def damage_hdf5(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Return the kind of damage, and a damaged `.h5` file."""
    kind = rng.choice(BYTES * 2 + HDF5 + [edit_json] * 4)
    if kind in BYTES:
        data = bytearray(content)
        kind(data, rng)
        return kind.__name__, bytes(data)
    buffer = io.BytesIO(content)
    with h5py.File(buffer, "r+") as file:
        if kind is not edit_json:
            for _ in range(rng.choice([1, 1, 1, 3])):
                # done before, or there is no such place
                with contextlib.suppress(KeyError, ValueError, OSError, IndexError, TypeError):
                    kind(file, rng)
        elif "model_config" in file.attrs:
            file.attrs["model_config"] = edit_json(file.attrs["model_config"], rng)
        else:
            return damage_hdf5(content, rng)
    return kind.__name__, buffer.getvalue()


def damage(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Return the kind of damage, and a damaged copy of a `.h5` file or archive."""
    if not content.startswith(b"PK"):
        return damage_hdf5(content, rng)
    if rng.random() < 0.3:
        kind, data = rng.choice(BYTES), bytearray(content)
        kind(data, rng)
        return kind.__name__, bytes(data)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice(["model.weights.h5", "config.json"] * 2 + ["metadata.json", "member"])
    if name == "model.weights.h5":
        kind, members[name] = damage_hdf5(members[name], rng)
    elif name == "member":
        kind = "member"
        moved = members.pop(rng.choice(list(members)))
        if rng.random() < 0.5:
            members[rng.choice(["config.json", "x", "/etc/x", "../x"])] = moved
    elif rng.random() < 0.7:
        kind, members[name] = "edit_json", edit_json(members[name].decode(), rng).encode()
    else:
        chosen, data = rng.choice(BYTES), bytearray(members[name])
        chosen(data, rng)
        kind, members[name] = f"{chosen.__name__} in JSON", bytes(data)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as archive:
        for name, member in members.items():
            archive.writestr(name, member)
    return kind, buffer.getvalue()
