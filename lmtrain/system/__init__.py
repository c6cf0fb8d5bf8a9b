"""What lmtrain needs of the machine: files, locks, console, progress, signals, devices, workers and processes."""
