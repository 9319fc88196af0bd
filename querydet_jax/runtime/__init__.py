"""What every layer may use: errors, files, hosts, the machine, progress."""
