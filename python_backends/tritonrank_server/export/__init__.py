"""A checkpoint → its graph → quantised → compared with what its publisher runs → published."""
