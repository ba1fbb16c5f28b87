"""The tasks, a file each; `longmem.evaluation.registry` names them."""
