"""Ray Serve: builds and runs the application."""
