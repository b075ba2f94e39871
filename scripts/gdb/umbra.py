"""umbra's commands for gdb."""
