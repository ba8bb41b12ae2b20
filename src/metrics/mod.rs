//! Segmentation and classification metrics with their statistics.
