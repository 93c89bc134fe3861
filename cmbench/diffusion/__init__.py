"""Pure mathematics over tensors: parameterizations, schedules, distances, solvers, tangents.

Nothing here builds a network, reads a file or draws a random number that its caller did not seed.
"""
