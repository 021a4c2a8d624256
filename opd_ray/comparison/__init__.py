"""Methods compared by a protocol that was written down first: ``opd-ray compare protocol.yaml``."""
