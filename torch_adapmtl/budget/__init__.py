"""How many weights are zero: the schedule, the bounds, and the solver that meets them."""
