"""A run as it happens: started by a launcher, stopped, saved, resumed, watched."""
