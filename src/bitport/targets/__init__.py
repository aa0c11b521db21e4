"""One runtime a file (or small folder): its rules, its exporter, its runner, its arithmetic."""
