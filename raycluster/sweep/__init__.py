"""Sweeps, without Ray: many runs that differ in a few settings; which to try, which to stop, which was best."""
