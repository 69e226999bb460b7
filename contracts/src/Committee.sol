// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {BlockHeader} from "@openzeppelin/contracts/utils/BlockHeader.sol";
import {Blockhash} from "@openzeppelin/contracts/utils/Blockhash.sol";
import {Checkpoints} from "@openzeppelin/contracts/utils/structs/Checkpoints.sol";
import {ICommittee} from "./interfaces/ICommittee.sol";
import {IDisputes} from "./interfaces/IDisputes.sol";
import {IJobs} from "./interfaces/IJobs.sol";
import {IResolver} from "./interfaces/IResolver.sol";
import {IVault} from "./interfaces/IVault.sol";

contract Committee is ICommittee {
    using Checkpoints for Checkpoints.Trace208;

    uint48 public constant SEED_DELAY = 128;
    uint32 public constant MAX_TICKETS = 1_000_000;
    uint32 public constant MAX_SEATS = 1_000;
    uint40 public constant MIN_WINDOW = 15 minutes;
    /// @dev Two of them end a day and more before a dispute's RESOLVE_WINDOW, so no verdict comes too late.
    uint40 public constant MAX_WINDOW = 6 days;
    uint40 public constant FORFEIT_TIME = 7 days;
    uint40 public constant MAX_LEAVE_DELAY = 90 days;
    uint128 public constant BURN_DIVISOR = 10;
    address private constant BURNT = 0x000000000000000000000000000000000000dEaD;
    /// @dev EIP-4399: where PREVRANDAO is random it is practically never below.
    uint256 private constant MIN_RANDOMNESS = 2 ** 64;

    IVault public immutable vault;
    IJobs public immutable jobs;
    IDisputes public immutable disputes;
    address public immutable token;
    uint128 private immutable _seatBond;
    uint32 private immutable _seats;
    uint32 private immutable _quorum;
    uint40 private immutable _commitWindow;
    uint40 private immutable _revealWindow;
    uint40 private immutable _leaveDelay;

    mapping(address juror => Juror) private _jurors;
    /// @dev By block. The zero address, which can not call, stands for all jurors.
    mapping(address juror => Checkpoints.Trace208) private _tickets;
    mapping(bytes32 jobId => Case) private _cases;
    mapping(bytes32 jobId => mapping(address juror => mapping(uint32 ticket => Seat))) private _taken;

    constructor(IVault vault_, IJobs jobs_, IDisputes disputes_, address token_, Parameters memory parameters_) {
        if (address(vault_).code.length == 0) revert Committee_NotAContract(address(vault_));
        if (address(jobs_).code.length == 0) revert Committee_NotAContract(address(jobs_));
        if (address(disputes_).code.length == 0) revert Committee_NotAContract(address(disputes_));
        if (block.prevrandao < MIN_RANDOMNESS) revert Committee_NoRandomness(block.prevrandao);
        if (!_within(parameters_)) revert Committee_BadParameters();
        vault = vault_;
        jobs = jobs_;
        disputes = disputes_;
        token = token_;
        _seatBond = parameters_.seatBond;
        _seats = parameters_.seats;
        _quorum = parameters_.quorum;
        _commitWindow = parameters_.commitWindow;
        _revealWindow = parameters_.revealWindow;
        _leaveDelay = parameters_.leaveDelay;
    }

    /// @inheritdoc ICommittee
    function enroll(uint32 tickets) external {
        if (tickets == 0) revert Committee_ZeroAmount();
        uint256 held = _jurors[msg.sender].tickets;
        if (held + tickets > MAX_TICKETS) revert Committee_TooManyTickets(held, tickets);

        uint32 now_ = uint32(held) + tickets;
        _jurors[msg.sender].tickets = now_;
        uint256 total = _record(msg.sender, now_, int256(uint256(tickets)));

        emit Enrolled(msg.sender, tickets, now_, total);

        vault.lock(token, msg.sender, uint256(tickets) * _seatBond);
    }

    /// @inheritdoc ICommittee
    function resign(uint32 tickets) external {
        if (tickets == 0) revert Committee_ZeroAmount();
        uint32 held = _jurors[msg.sender].tickets;
        if (tickets > held) revert Committee_TooFewTickets(held, tickets);

        _takeOut(msg.sender, tickets, uint128(tickets) * _seatBond);
    }

    /// @inheritdoc ICommittee
    function withdrawBond() external returns (uint128 amount) {
        Juror storage juror = _jurors[msg.sender];
        amount = juror.leaving;
        if (amount == 0) revert Committee_NothingFree(msg.sender);
        if (block.timestamp < juror.freeAt) revert Committee_TooEarly(juror.freeAt, block.timestamp);

        juror.leaving = 0;

        emit BondWithdrawn(msg.sender, amount);

        vault.release(token, msg.sender, amount);
    }

    /// @inheritdoc IResolver
    function begin(bytes32 jobId, bytes32 specHash, bytes32 resultHash, bytes32 evidence) external {
        if (msg.sender != address(disputes)) revert Committee_NotDisputes(msg.sender);
        Case storage record = _cases[jobId];
        if (record.snapshot != 0) revert Committee_Known(jobId);

        uint48 seedBlock = uint48(block.number) + SEED_DELAY;
        uint40 commitEnds = uint40(block.timestamp) + _commitWindow;
        uint40 revealEnds = commitEnds + _revealWindow;
        record.snapshot = uint48(block.number);
        record.seedBlock = seedBlock;
        record.commitEnds = commitEnds;
        record.revealEnds = revealEnds;
        record.specHash = specHash;
        record.resultHash = resultHash;
        record.evidence = evidence;

        emit Begun(jobId, specHash, resultHash, evidence, seedBlock, commitEnds, revealEnds);
    }

    /// @inheritdoc ICommittee
    function seal(bytes32 jobId, bytes calldata header) external {
        Case storage record = _known(jobId);
        if (record.seed != 0) revert Committee_Sealed(jobId);
        if (block.timestamp >= record.commitEnds) revert Committee_TooLate(record.commitEnds, block.timestamp);
        uint48 seedBlock = record.seedBlock;
        // A block does not know its own hash: it reads as zero, like one that is too old.
        if (block.number <= seedBlock) revert Committee_TooEarly(seedBlock + 1, block.number);
        bytes32 hash = Blockhash.blockHash(seedBlock);
        if (hash == 0) {
            seedBlock = uint48(block.number) + SEED_DELAY;
            record.seedBlock = seedBlock;
            emit SeedScheduled(jobId, seedBlock);
            return;
        }
        if (keccak256(header) != hash) revert Committee_WrongHeader(seedBlock);

        bytes32 seed = keccak256(abi.encode(BlockHeader.getPrevRandao(header), jobId));
        record.seed = seed;

        emit SeedSealed(jobId, seed);
    }

    /// @inheritdoc ICommittee
    function commit(bytes32 jobId, uint32 ticket, bytes32 commitment) external {
        Case storage record = _known(jobId);
        if (record.seed == 0) revert Committee_NotSealed(jobId);
        if (block.timestamp >= record.commitEnds) revert Committee_TooLate(record.commitEnds, block.timestamp);
        if (!_isTicket(record, msg.sender, ticket)) revert Committee_NoSuchTicket(msg.sender, ticket);
        if (!_isDrawn(record, msg.sender, ticket)) revert Committee_NoSeat(msg.sender, ticket);
        Seat storage seat = _taken[jobId][msg.sender][ticket];
        if (seat.state != SeatState.None) revert Committee_Committed(msg.sender, ticket);

        seat.commitment = commitment;
        seat.state = SeatState.Committed;
        record.commits += 1;

        emit Committed(jobId, msg.sender, ticket);
    }

    /// @inheritdoc ICommittee
    function reveal(bytes32 jobId, uint32 ticket, Outcome vote, bytes32 resultHash, bytes32 salt) external {
        Case storage record = _known(jobId);
        // Not a moment earlier: whoever may still commit must not see how others voted.
        if (block.timestamp < record.commitEnds) revert Committee_TooEarly(record.commitEnds, block.timestamp);
        if (block.timestamp >= record.revealEnds) revert Committee_TooLate(record.revealEnds, block.timestamp);
        if (vote != Outcome.Accept && vote != Outcome.Reject) revert Committee_BadVote(vote);
        Seat storage seat = _taken[jobId][msg.sender][ticket];
        bytes32 commitment = keccak256(abi.encode(jobId, msg.sender, ticket, vote, resultHash, salt));
        if (seat.state != SeatState.Committed || seat.commitment != commitment) {
            revert Committee_BadReveal(msg.sender, ticket);
        }

        if (vote == Outcome.Accept) {
            seat.state = SeatState.Accepted;
            record.accepts += 1;
        } else {
            seat.state = SeatState.Rejected;
            record.rejects += 1;
        }

        emit Revealed(jobId, msg.sender, ticket, vote, resultHash);
    }

    /// @inheritdoc ICommittee
    function forfeit(bytes32 jobId, address juror, uint32 ticket) external {
        Case storage record = _known(jobId);
        if (block.timestamp < record.revealEnds) revert Committee_TooEarly(record.revealEnds, block.timestamp);
        Seat storage seat = _taken[jobId][juror][ticket];
        if (seat.state != SeatState.Committed) revert Committee_NothingToForfeit(jobId, juror, ticket);

        seat.state = SeatState.Forfeited;
        Juror storage account = _jurors[juror];
        uint128 burnt = _seatBond / BURN_DIVISOR;
        if (account.tickets > 0) {
            _takeOut(juror, 1, _seatBond - burnt);
        } else {
            // Tickets that left are still behind their seats: the delay outlasts every case. Only many silent seats of
            // one ticket can use it up.
            if (burnt > account.leaving) burnt = account.leaving;
            account.leaving -= burnt;
        }

        emit Forfeited(jobId, juror, ticket, burnt);

        if (burnt > 0) vault.release(token, BURNT, burnt);
    }

    /// @inheritdoc ICommittee
    function claimFee(IJobs.Quote calldata quote, uint32 ticket) external returns (uint256 amount) {
        bytes32 jobId = jobs.jobIdOf(quote);
        Case storage record = _known(jobId);
        IDisputes.Dispute memory dispute = disputes.disputeOf(jobId);
        Seat storage seat = _taken[jobId][msg.sender][ticket];
        (bool eligible, uint256 winners) = _won(record, seat.state, dispute.outcome);
        if (!eligible || dispute.fee == 0) revert Committee_NoFee(jobId, msg.sender, ticket);

        uint256 paid = record.paid;
        // The same as "what remains, by how many remain", without keeping what remains.
        amount = dispute.fee / winners + (paid < winners - dispute.fee % winners ? 0 : 1);
        seat.state = SeatState.Paid;
        record.paid = uint32(paid + 1);

        emit FeeClaimed(jobId, msg.sender, ticket, amount);

        // The fee came to this contract's free balance; a module moves its own through its lock.
        vault.lockBond(quote.token, address(this), amount);
        vault.release(quote.token, msg.sender, amount);
    }

    /// @inheritdoc IResolver
    function outcome(bytes32 jobId) external view returns (Outcome) {
        Case storage record = _cases[jobId];
        uint256 accepts = record.accepts;
        uint256 rejects = record.rejects;
        uint256 revealed = accepts + rejects;
        if (block.timestamp < record.commitEnds) return Outcome.None;
        if (block.timestamp < record.revealEnds && revealed < record.commits) return Outcome.None;
        if (revealed < _quorum) return Outcome.None;
        if (accepts == rejects) return Outcome.Draw;
        return accepts > rejects ? Outcome.Accept : Outcome.Reject;
    }

    /// @inheritdoc ICommittee
    function hasSeat(bytes32 jobId, address juror, uint32 ticket) external view returns (bool) {
        Case storage record = _cases[jobId];
        return record.seed != 0 && juror != address(0) && _isTicket(record, juror, ticket)
            && _isDrawn(record, juror, ticket);
    }

    /// @inheritdoc ICommittee
    function caseOf(bytes32 jobId) external view returns (Case memory) {
        return _cases[jobId];
    }

    /// @inheritdoc ICommittee
    function seatOf(bytes32 jobId, address juror, uint32 ticket) external view returns (Seat memory) {
        return _taken[jobId][juror][ticket];
    }

    /// @inheritdoc ICommittee
    function jurorOf(address juror) external view returns (Juror memory) {
        return _jurors[juror];
    }

    /// @inheritdoc ICommittee
    function ticketsAt(address juror, uint48 blockNumber) external view returns (uint256) {
        if (blockNumber >= block.number) revert Committee_TooEarly(uint256(blockNumber) + 1, block.number);
        return _tickets[juror].upperLookupRecent(blockNumber);
    }

    /// @inheritdoc ICommittee
    function parameters() external view returns (Parameters memory) {
        return Parameters(_seatBond, _seats, _quorum, _commitWindow, _revealWindow, _leaveDelay);
    }

    function _within(Parameters memory p) private pure returns (bool) {
        return p.seatBond >= BURN_DIVISOR && p.seatBond <= type(uint96).max && p.seats > 0 && p.seats <= MAX_SEATS
            && p.quorum > 0 && p.quorum <= p.seats && p.commitWindow >= MIN_WINDOW && p.commitWindow <= MAX_WINDOW
            && p.revealWindow >= MIN_WINDOW && p.revealWindow <= MAX_WINDOW && p.leaveDelay <= MAX_LEAVE_DELAY
            && p.leaveDelay >= uint256(p.commitWindow) + p.revealWindow + FORFEIT_TIME;
    }

    function _known(bytes32 jobId) private view returns (Case storage record) {
        record = _cases[jobId];
        if (record.snapshot == 0) revert Committee_Unknown(jobId);
    }

    function _isTicket(Case storage record, address juror, uint32 ticket) private view returns (bool) {
        return ticket < _tickets[juror].upperLookupRecent(record.snapshot);
    }

    function _isDrawn(Case storage record, address juror, uint32 ticket) private view returns (bool) {
        uint256 total = _tickets[address(0)].upperLookupRecent(record.snapshot);
        if (total <= _seats) return true;
        uint256 draw = uint256(keccak256(abi.encode(record.seed, juror, ticket)));
        return draw < type(uint256).max / total * _seats;
    }

    /// @dev Whether a seat in `state` shares the fee of a dispute that ended so, and how many do.
    function _won(Case storage record, SeatState state, Outcome ended) private view returns (bool, uint256) {
        bool accepted = state == SeatState.Accepted;
        bool rejected = state == SeatState.Rejected;
        if (ended == Outcome.Accept) return (accepted, record.accepts);
        if (ended == Outcome.Reject) return (rejected, record.rejects);
        return (ended == Outcome.Draw && (accepted || rejected), uint256(record.accepts) + record.rejects);
    }

    function _takeOut(address account, uint32 tickets, uint128 bond) private {
        Juror storage juror = _jurors[account];
        uint32 now_ = juror.tickets - tickets;
        uint40 freeAt = uint40(block.timestamp) + _leaveDelay;
        juror.tickets = now_;
        juror.leaving += bond;
        juror.freeAt = freeAt;
        uint256 total = _record(account, now_, -int256(uint256(tickets)));

        emit Resigned(account, tickets, now_, total, freeAt);
    }

    function _record(address juror, uint32 tickets, int256 change) private returns (uint256 total) {
        total = uint256(int256(uint256(_tickets[address(0)].latest())) + change);
        _tickets[juror].push(uint48(block.number), tickets);
        _tickets[address(0)].push(uint48(block.number), uint208(total));
    }
}
