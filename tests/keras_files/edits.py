"""Changes to a valid Keras file, for the fixture `edited`."""

import json

KERNEL = "model_weights/conv2d/conv2d/kernel"  # of `plain.h5`, as Keras 3 writes it


def edit_config(change):
    """Return an edit of a whole model's configuration: `change` modifies it, or returns another."""

    def edit(file):
        config = json.loads(file.attrs["model_config"])
        changed = change(config) or config
        file.attrs["model_config"] = json.dumps(changed)

    return edit


def first_of(config, class_name):
    """Return the first layer of a class."""
    return next(entry for entry in config["config"]["layers"] if entry["class_name"] == class_name)


def with_options(class_name, **options):
    """Return an edit of the options of the first layer of a class."""
    return edit_config(lambda config: first_of(config, class_name)["config"].update(options))


def without(class_name, option):
    """Return an edit that removes an option of all layers of a class."""

    def change(config):
        for entry in config["config"]["layers"]:
            if entry["class_name"] == class_name:
                del entry["config"][option]

    return edit_config(change)


def replace_kernel(make, name=KERNEL):
    """Return an edit that replaces the first kernel by `make(file, name)`."""

    def edit(file):
        del file[name]
        make(file, name)

    return edit
