"""One file per PEFT type: a module here that defines ``METHOD`` is one."""
