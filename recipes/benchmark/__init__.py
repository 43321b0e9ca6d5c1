"""What the engine costs and what it reaches, measured on the machine at hand."""
