//! Devices, buffers, launch and caches of Einfall.
