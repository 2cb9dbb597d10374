"""What one runs beside training; tools import the house, the house never imports tools."""
