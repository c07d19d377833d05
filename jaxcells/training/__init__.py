"""The train state, the jitted steps, the device mesh, checkpoints, and the loop that uses them."""
