"""What people see: tables, plots, pictures, HTML, JUnit."""
