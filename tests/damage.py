"""Changes to a bundle's manifest, and to its graph."""

import json


def edit(folder, change, name="manifest.json"):
    file = folder / name
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))


def edited(change, name="manifest.json"):
    """A function of the folder."""
    return lambda folder: edit(folder, change, name)


def put(value, *path, name="manifest.json"):
    """A function of the folder that sets a field of the manifest; without a value, removes it."""

    def change(manifest):
        *parents, last = path
        for key in parents:
            manifest = manifest[key]
        if value is None:
            del manifest[last]
        else:
            manifest[last] = value

    return edited(change, name)


def flip_a_byte(folder, name="model.onnx"):
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
