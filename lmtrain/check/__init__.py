"""`lmtrain check`: what a configuration would come to, and whether a run is whole."""
