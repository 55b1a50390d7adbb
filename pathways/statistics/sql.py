"""SQL over tables in memory: one query, nothing but reading."""

from __future__ import annotations

import contextlib

import pyarrow as pa

from tasks.errors import UserError


def run_sql(tables: dict[str, pa.Table], query: str) -> pa.Table:
    """Runs one SELECT of DuckDB over the tables. It can neither open files nor reach the network nor load extensions.

    Raises:
        UserError: with DuckDB's own message and the tables and columns there are.
    """
    import duckdb

    with duckdb.connect(":memory:", config={"temp_directory": "", "python_enable_replacements": "false"}) as connection:
        for name, table in tables.items():
            connection.register(name, table)
        connection.execute("SET enable_external_access = false")
        connection.execute("SET lock_configuration = true")
        try:
            statements = connection.extract_statements(query)
            allowed = (duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN)
            if len(statements) != 1 or statements[0].type not in allowed:
                kinds = ", ".join(str(statement.type).rpartition(".")[2] for statement in statements)
                raise _error(tables, query, "one SELECT (or DESCRIBE, SHOW, EXPLAIN)", kinds or "nothing")
            return _narrow(connection.sql(query).to_arrow_table())
        except duckdb.Error as error:
            raise _error(tables, query, None, str(error).strip()) from None


def _narrow(table: pa.Table) -> pa.Table:
    """DuckDB sums whole numbers to 128 bits, which Arrow shows as decimals: back to 64 bits where they fit."""
    for i, field in enumerate(table.schema):
        if pa.types.is_decimal(field.type) and field.type.scale == 0:
            with contextlib.suppress(pa.ArrowInvalid):
                table = table.set_column(i, field.name, table.column(i).cast(pa.int64()))
    return table


def _error(tables: dict[str, pa.Table], query: str, expected: str | None, got: str) -> UserError:
    words = [f"{name}({', '.join(table.column_names)})" for name, table in tables.items()]
    indent = "\n" + " " * 12
    return UserError(
        "the SQL query does not run",
        where=" ".join(query.split()),
        expected=expected,
        got=got.replace("\n", indent),
        fix="use these tables and columns:" + indent + indent.join(words),
    )
