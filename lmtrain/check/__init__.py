"""`lmtrain check`: what training with a configuration would cost, and whether a run is whole."""
