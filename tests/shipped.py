"""The shipped configs by name: of pre-training runs, of the stages after it, and of deployment units."""

import pkgutil

import configs

_ALL = {module.name for module in pkgutil.iter_modules(configs.__path__)} - {"defaults", "serve_defaults"}
OF_UNITS = sorted(name for name in _ALL if name.startswith("serve_"))
OF_STAGES = sorted(name for name in _ALL if name.endswith(("_extend", "_sft", "_grpo", "_distill")))
OF_RUNS = sorted(_ALL - set(OF_UNITS) - set(OF_STAGES))
