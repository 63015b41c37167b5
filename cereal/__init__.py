"""openpilot's message schemas: log, car, deprecated and custom (ours). capnp's own import hook is switched off, as
openpilot does."""

import os

import capnp

CEREAL_PATH = os.path.dirname(os.path.realpath(__file__))
capnp.remove_import_hook()

log = capnp.load(os.path.join(CEREAL_PATH, "log.capnp"), imports=[CEREAL_PATH])
car = capnp.load(os.path.join(CEREAL_PATH, "car.capnp"), imports=[CEREAL_PATH])
custom = capnp.load(os.path.join(CEREAL_PATH, "custom.capnp"), imports=[CEREAL_PATH])
deprecated = capnp.load(os.path.join(CEREAL_PATH, "deprecated.capnp"), imports=[CEREAL_PATH])
