"""The machine below: files, locks, the console, signals, devices and the processes that train together."""
