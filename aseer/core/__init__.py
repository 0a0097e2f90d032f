"""What scheduler and controller stand on: pure, and in C++ where it must be fast."""
