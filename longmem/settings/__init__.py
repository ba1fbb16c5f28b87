"""What a run is told: dataclasses of settings, read from YAML files and changed on a command line."""

from longmem.settings.files import read_settings, save_settings, settings_text
from longmem.settings.reading import Above, Below, From, UpTo, dotted_names, read_section

__all__ = [
    "Above",
    "Below",
    "From",
    "UpTo",
    "dotted_names",
    "read_section",
    "read_settings",
    "save_settings",
    "settings_text",
]
