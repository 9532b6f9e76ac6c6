"""The winner at work: as a module of torch, at new images, and as a file that torch alone loads."""
