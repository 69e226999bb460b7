// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {AccessControlDefaultAdminRules} from "@openzeppelin/contracts/access/extensions/AccessControlDefaultAdminRules.sol";
import {IERC3009} from "@openzeppelin/contracts/interfaces/draft-IERC3009.sol";
import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {IERC20Permit} from "@openzeppelin/contracts/token/ERC20/extensions/IERC20Permit.sol";
import {SafeERC20} from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";
import {Address} from "@openzeppelin/contracts/utils/Address.sol";
import {ReentrancyGuardTransient} from "@openzeppelin/contracts/utils/ReentrancyGuardTransient.sol";
import {IVault} from "./interfaces/IVault.sol";

contract Vault is IVault, AccessControlDefaultAdminRules, ReentrancyGuardTransient {
    using SafeERC20 for IERC20;

    bytes32 public constant TOKEN_ADMIN = keccak256("TOKEN_ADMIN");
    bytes32 public constant GUARDIAN = keccak256("GUARDIAN");
    address private constant NATIVE = address(0);

    address private immutable _deployer;

    /// @inheritdoc IVault
    bool public isSealed;
    /// @inheritdoc IVault
    bool public paused;
    /// @inheritdoc IVault
    mapping(address token => mapping(address account => uint256)) public balanceOf;
    /// @inheritdoc IVault
    mapping(address token => uint256) public liabilities;
    /// @inheritdoc IVault
    mapping(address module => mapping(address token => uint256)) public lockedBy;
    /// @inheritdoc IVault
    mapping(address account => bool) public isModule;
    /// @inheritdoc IVault
    mapping(address token => bool) public isTokenAllowed;

    modifier onlyModule() {
        if (!isModule[msg.sender]) revert Vault_NotModule(msg.sender);
        _;
    }

    /// @param admin First holder of the admin, TOKEN_ADMIN and GUARDIAN roles; it hands the last two on.
    /// @param adminDelay Seconds that a change of the admin must wait.
    constructor(address admin, uint48 adminDelay) AccessControlDefaultAdminRules(adminDelay, admin) {
        _deployer = msg.sender;
        _grantRole(TOKEN_ADMIN, admin);
        _grantRole(GUARDIAN, admin);
    }

    /// @inheritdoc IVault
    function deposit(address token, uint256 amount, address beneficiary)
        external
        payable
        nonReentrant
        returns (uint256 credited)
    {
        _admit(token, beneficiary);
        uint256 expected = token == NATIVE ? amount : 0;
        if (msg.value != expected) revert Vault_WrongValue(expected, msg.value);

        // The transfer comes first here: what is credited is what it brought. The guard keeps callbacks out.
        credited = token == NATIVE ? amount : _pull(IERC20(token), amount);
        _credit(token, msg.sender, beneficiary, credited);
    }

    /// @inheritdoc IVault
    function depositWithPermit(
        address token,
        uint256 amount,
        address beneficiary,
        uint256 deadline,
        uint8 v,
        bytes32 r,
        bytes32 s
    ) external nonReentrant returns (uint256 credited) {
        _admitToken(token, amount, beneficiary);

        // A permit is public: whoever uses it first must not be able to stop the deposit. What counts is the allowance.
        try IERC20Permit(token).permit(msg.sender, address(this), amount, deadline, v, r, s) {} catch {}
        credited = _pull(IERC20(token), amount);
        _credit(token, msg.sender, beneficiary, credited);
    }

    /// @inheritdoc IVault
    function depositWithAuthorization(
        address token,
        address from,
        uint256 amount,
        uint256 validAfter,
        uint256 validBefore,
        bytes32 nonce,
        uint8 v,
        bytes32 r,
        bytes32 s
    ) external nonReentrant returns (uint256 credited) {
        _admitToken(token, amount, from);

        uint256 before = IERC20(token).balanceOf(address(this));
        IERC3009(token).receiveWithAuthorization(
            from, address(this), amount, validAfter, validBefore, nonce, v, r, s
        );
        credited = IERC20(token).balanceOf(address(this)) - before;
        _credit(token, from, from, credited);
    }

    /// @inheritdoc IVault
    function withdraw(address token, uint256 amount, address to) external nonReentrant {
        if (to == address(0) || to == address(this)) revert Vault_BadRecipient(to);
        if (amount == 0) revert Vault_ZeroAmount();

        _debit(token, msg.sender, amount);
        liabilities[token] -= amount;

        emit Withdrawn(token, msg.sender, to, amount);

        if (token == NATIVE) Address.sendValue(payable(to), amount);
        else IERC20(token).safeTransfer(to, amount);
    }

    /// @inheritdoc IVault
    function lock(address token, address from, uint256 amount) external onlyModule {
        if (paused) revert Vault_Paused();
        _lock(token, from, amount);
    }

    /// @inheritdoc IVault
    function lockBond(address token, address from, uint256 amount) external onlyModule {
        _lock(token, from, amount);
    }

    /// @inheritdoc IVault
    function release(address token, address to, uint256 amount) external {
        uint256 locked = lockedBy[msg.sender][token];
        // Only a module can have locked anything, so one that holds enough needs no look at the list: 2,100 gas less.
        if (amount == 0 || amount > locked) {
            if (!isModule[msg.sender]) revert Vault_NotModule(msg.sender);
            if (amount > locked) revert Vault_ReleaseExceedsLocked(msg.sender, token, locked, amount);
        }

        unchecked {
            lockedBy[msg.sender][token] = locked - amount; // looked at above
            balanceOf[token][to] += amount; // never above liabilities, which did not overflow
        }

        emit Released(msg.sender, token, to, amount);
    }

    /// @inheritdoc IVault
    function seal(address[] calldata modules) external {
        if (msg.sender != _deployer) revert Vault_NotDeployer(msg.sender);
        if (isSealed) revert Vault_AlreadySealed();

        isSealed = true;
        for (uint256 i = 0; i < modules.length; ++i) {
            if (modules[i].code.length == 0) revert Vault_NotAContract(modules[i]);
            isModule[modules[i]] = true;
        }

        emit Sealed(modules);
    }

    /// @inheritdoc IVault
    function setToken(address token, bool allowed) external onlyRole(TOKEN_ADMIN) {
        isTokenAllowed[token] = allowed;
        emit TokenSet(token, allowed);
    }

    /// @inheritdoc IVault
    function setPaused(bool paused_) external onlyRole(GUARDIAN) {
        paused = paused_;
        emit PausedSet(msg.sender, paused_);
    }

    function _admit(address token, address beneficiary) private view {
        if (!isSealed) revert Vault_NotSealed();
        if (paused) revert Vault_Paused();
        if (!isTokenAllowed[token]) revert Vault_TokenNotAllowed(token);
        if (beneficiary == address(0)) revert Vault_ZeroAddress();
    }

    /// @dev For calls that carry no value: they can not bring the native coin.
    function _admitToken(address token, uint256 amount, address beneficiary) private view {
        _admit(token, beneficiary);
        if (token == NATIVE) revert Vault_WrongValue(amount, 0);
    }

    function _credit(address token, address from, address beneficiary, uint256 credited) private {
        if (credited == 0) revert Vault_ZeroAmount();

        balanceOf[token][beneficiary] += credited;
        liabilities[token] += credited;

        emit Deposited(token, from, beneficiary, credited);
    }

    function _lock(address token, address from, uint256 amount) private {
        _debit(token, from, amount);
        lockedBy[msg.sender][token] += amount;

        emit Locked(msg.sender, token, from, amount);
    }

    function _debit(address token, address account, uint256 amount) private {
        uint256 balance = balanceOf[token][account];
        if (amount > balance) revert Vault_Insufficient(token, account, balance, amount);
        balanceOf[token][account] = balance - amount;
    }

    function _pull(IERC20 token, uint256 amount) private returns (uint256) {
        uint256 before = token.balanceOf(address(this));
        token.safeTransferFrom(msg.sender, address(this), amount);
        return token.balanceOf(address(this)) - before;
    }
}
