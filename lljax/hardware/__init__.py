"""The machine: chips, devices to compile for, compiler flags and host memory."""
