-- Which releases can run on a schema that is newer than they are, so that a rolling upgrade may restart an old one.
-- min-reader: 0004

-- The lowest last migration of such a release; NULL: only releases that have the migration themselves.
ALTER TABLE helixflow.migrations ADD COLUMN min_reader integer CHECK (min_reader BETWEEN 1 AND number);
