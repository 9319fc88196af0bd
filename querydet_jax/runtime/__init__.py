"""What every layer may use: errors, files, checkpoints, hosts, the machine, progress."""
