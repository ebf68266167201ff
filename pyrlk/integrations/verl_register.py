"""For verl's `model.external_lib` and VERL_USE_EXTERNAL_MODULES: to import it is to register."""

from .verl import register

register()
