"""The commands of `longmem`, one module each; `longmem.cli` imports a module when its command runs."""
