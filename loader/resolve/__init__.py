"""Which files of a listing a config asks for. Pure: no I/O, no clock."""
