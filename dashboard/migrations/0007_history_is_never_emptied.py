"""History tables refuse TRUNCATE, which row triggers do not see. Reversible."""

from django.db import migrations

PROTECT = """
    CREATE FUNCTION dashboard_history_is_never_emptied() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        IF current_setting('deltaworks.may_empty_history', true) IS DISTINCT FROM 'yes' THEN
            RAISE EXCEPTION 'history is only added to: TRUNCATE of % is refused', TG_TABLE_NAME;
        END IF;
        RETURN NULL;
    END $$;
    DO $$ DECLARE name text; BEGIN
        FOR name IN SELECT tablename FROM pg_tables WHERE schemaname = current_schema() AND tablename LIKE 'dashboard\\_%event' LOOP
            EXECUTE format('CREATE TRIGGER never_emptied BEFORE TRUNCATE ON %I '
                           'EXECUTE FUNCTION dashboard_history_is_never_emptied()', name);
        END LOOP;
    END $$;
"""
RELEASE = """
    DROP FUNCTION dashboard_history_is_never_emptied() CASCADE;
"""


class Migration(migrations.Migration):

    dependencies = [
        ('dashboard', '0006_epochs'),
    ]

    operations = [
        migrations.RunSQL(PROTECT, RELEASE),
    ]
