"""The test suite; it mirrors s4g_ray/."""
