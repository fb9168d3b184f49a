"""The shipped configs by name: of runs, and of deployment units."""

import pkgutil

import configs

_ALL = {module.name for module in pkgutil.iter_modules(configs.__path__)} - {"defaults", "serve_defaults"}
OF_UNITS = sorted(name for name in _ALL if name.startswith("serve_"))
OF_RUNS = sorted(_ALL - set(OF_UNITS))
