"""Changes to a valid Keras file, for the fixture `edited`."""

import json

KERNEL = "model_weights/conv2d/conv2d/kernel"  # of `plain.h5`, as Keras 3 writes it


def edit_config(change):
    """Return an edit of a whole model's configuration."""

    def edit(file):
        config = json.loads(file.attrs["model_config"])
        changed = change(config) or config
        file.attrs["model_config"] = json.dumps(changed)

    return edit


def replace_kernel(make, name=KERNEL):
    def edit(file):
        del file[name]
        make(file, name)

    return edit
